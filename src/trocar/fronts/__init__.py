"""What the spellings of other libraries share: values that record themselves, indices, saved results."""
