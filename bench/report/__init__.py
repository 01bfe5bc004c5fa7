"""What the documents quote from the results."""
