"""What a training job is told, and what it tells back: records and pure rules, free of torch by contract."""
