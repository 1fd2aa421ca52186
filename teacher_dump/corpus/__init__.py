"""Files and folders -> documents; knows no engine and no token store."""
