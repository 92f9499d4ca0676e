"""The viewer (`vcot view`): a local web app that shows runs as they go on, and every task of them."""
