"""Runs on a remote store: their files are here in name and size, and each byte comes when it is first read."""
