"""Speed as a ratio against a peer, measured side by side in one process."""
