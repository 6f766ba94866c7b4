"""Smaller students of a merged model: cut out of it (`trim`, by `importance`), then trained against it (`teacher`, `lessons`, `objectives`, `training`)."""
