"""What a whole run is told, and the recipes that come with vcot."""
