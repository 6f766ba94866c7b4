"""Recipe to bundle: merge, distil, quantize, export, validate, package."""
