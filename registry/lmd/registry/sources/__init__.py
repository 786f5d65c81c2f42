"""Where pulls come from: the Hub, URLs and local files."""
