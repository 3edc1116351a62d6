"""The control API, the process that serves volumes, and sessions, which hide where a verb runs."""
