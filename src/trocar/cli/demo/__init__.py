"""`trocar demo`: the tour. It drives a real server over HTTP with the SDK and writes one HTML report."""
