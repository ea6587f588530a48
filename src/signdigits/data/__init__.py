"""Photographs: where they come from, how they are split, decoded, cached and checked."""
