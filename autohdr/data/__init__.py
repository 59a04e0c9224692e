"""Images in and out, pairs, splits and synthetic scenes."""
