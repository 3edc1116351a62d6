//! The Python extension module: registration only.
