"""The loss and its schedules; knows no data and no model."""
