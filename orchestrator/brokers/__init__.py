"""What differs between brokers, beyond what kombu hides."""
