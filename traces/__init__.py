"""What a link does over time: traces, their formats, generators and library. Needs numpy only."""
