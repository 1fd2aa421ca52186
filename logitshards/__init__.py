"""What the commands share with each other: options, configuration files, errors on one line."""
