"""The command line: one file for each command, with its options, its call and its terminal output."""
