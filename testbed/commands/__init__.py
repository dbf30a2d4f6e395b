"""The commands of `kvstream`, one file a group; each adds its own parsers and imports what it needs when it runs."""
