"""Runs on disk: settings, the folder, checkpoints, studies of many runs."""
