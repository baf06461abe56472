"""The commands of `clipstack data`, a file each: its arguments, its run, what it prints."""
