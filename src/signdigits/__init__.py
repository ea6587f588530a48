"""Read the digit that a photographed hand signs: tracked, searched, registered and served with MLflow."""
