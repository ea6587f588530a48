"""The hyperparameter search: its objective, study, search space, executors and storage."""
