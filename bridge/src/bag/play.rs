//! Playing a bag.
