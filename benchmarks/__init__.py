"""What an epoch, a trial, a search, a request and a start cost, as ratios against what a user would run instead."""
