"""One server as three processes: a front that speaks HTTP, a gate that keeps the books, a worker with the weights."""
