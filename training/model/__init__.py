"""The model while it trains: loaded, asked, and recognised again."""
