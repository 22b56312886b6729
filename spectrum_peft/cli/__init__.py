"""The command line: one file for each verb, found and run by `main`."""
