"""The engine: clients packed on lanes, lanes spread over devices, and what they deliver merged."""
