"""Numbers that judge: whether probabilities can be believed, how far answers lie apart."""
