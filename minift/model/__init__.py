"""The decoder: configuration, rotary positions, attention, blocks, loading and generating."""
