"""What a command needs of its process."""
