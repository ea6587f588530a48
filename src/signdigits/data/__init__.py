"""A folder of photographs becomes arrays: named, checked, digested, split and decoded."""
