"""The nano world: drawn scenes, and multiple-choice questions about them."""
