"""Files that appear whole, notice damage, and are read with types."""
