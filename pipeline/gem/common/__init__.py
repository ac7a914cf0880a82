"""Ground of all rooms: configuration, errors, files, processes, log messages, plot style.

Imports no other room.
"""
