"""One config per launch: what it follows, the command, the time it takes, the result."""
