"""The replicas behind the gateway, and which of them answers."""
