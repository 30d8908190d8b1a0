"""Methods of others, one file each."""
