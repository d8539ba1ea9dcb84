"""The commands, grouped by what they are for; nothing heavy is imported before a command runs."""
