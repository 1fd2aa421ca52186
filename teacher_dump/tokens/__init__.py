"""Documents -> flat tokens on disk -> numbered sequences."""
