//! What fuzz targets share.

pub mod attack;
