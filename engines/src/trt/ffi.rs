//! The smallest layer: pointers to C++ objects and calls through their vtables.
#![allow(unsafe_code)] // FFI fence: virtual calls into TensorRT.

use std::ffi::c_void;
use std::ptr::NonNull;

use super::abi::DELETE_SLOT;

/// TensorRT's `Dims64`: 72 bytes, returned through a hidden pointer.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dims {
    pub(super) count: i32,
    pub(super) extent: [i64; 8],
}

impl Dims {
    pub(super) fn new(shape: &[i64]) -> Option<Dims> {
        let mut extent = [0; 8];
        extent.get_mut(..shape.len())?.copy_from_slice(shape);
        Some(Dims { count: i32::try_from(shape.len()).ok()?, extent })
    }

    /// Extents; none when TensorRT answers with an invalid rank.
    pub(super) fn shape(&self) -> Option<Vec<i64>> {
        let count = usize::try_from(self.count).ok()?;
        self.extent.get(..count).map(<[i64]>::to_vec)
    }
}

/// A pointer that TensorRT returned, if it can be one: the libraries return small numbers such as 0x228 (an offset
/// added to null) where creation failed, so anything below a page, or unaligned, is a failure.
pub(super) fn valid(pointer: *mut c_void) -> Option<NonNull<c_void>> {
    let address = pointer as usize;
    if address < 4096 || !address.is_multiple_of(align_of::<usize>()) { None } else { NonNull::new(pointer) }
}

/// The function at a slot of an object's vtable.
///
/// # Safety
/// `object` is a live C++ object whose vtable has a function of type `F` at `slot`.
pub(super) unsafe fn method<F: Copy>(object: NonNull<c_void>, slot: usize) -> F {
    const { assert!(size_of::<F>() == size_of::<*const c_void>()) };
    // SAFETY: an object with virtual methods begins with its vtable pointer (Itanium C++ ABI), and the caller
    // promises the slot and its type; both are pointer sized.
    unsafe {
        let vtable = *object.as_ptr().cast::<*const *const c_void>();
        std::mem::transmute_copy::<*const c_void, F>(&*vtable.add(slot))
    }
}

/// An owned TensorRT object, deleted through its virtual destructor.
pub(super) struct Object {
    pointer: NonNull<c_void>,
    delete_slot: usize,
}

// SAFETY: TensorRT's objects may be used from any thread, one at a time; `Object` hands out no aliases of its own.
unsafe impl Send for Object {}

impl Object {
    /// Takes ownership of a pointer that a `create...` call returned; none if it is not a pointer.
    ///
    /// # Safety
    /// If valid, `pointer` is an owned object that begins with `INoCopy`.
    pub(super) unsafe fn own(pointer: *mut c_void) -> Option<Object> {
        valid(pointer).map(|pointer| Object { pointer, delete_slot: DELETE_SLOT })
    }

    /// As `own`, for classes whose deleting destructor lies elsewhere.
    ///
    /// # Safety
    /// As `own`, with the deleting destructor at `delete_slot`.
    pub(super) unsafe fn own_with(pointer: *mut c_void, delete_slot: usize) -> Option<Object> {
        valid(pointer).map(|pointer| Object { pointer, delete_slot })
    }

    /// The object itself.
    pub(super) fn pointer(&self) -> NonNull<c_void> {
        self.pointer
    }

    /// The implementation object behind it: the word after the vtable pointer.
    pub(super) fn implementation(&self) -> NonNull<c_void> {
        // SAFETY: every class owned here is INoCopy (vtable pointer) followed by `mImpl`.
        unsafe { implementation(self.pointer) }
    }
}

/// The implementation behind a TensorRT object.
///
/// # Safety
/// `object` is a live object of a class laid out as vtable pointer, implementation pointer.
pub(super) unsafe fn implementation(object: NonNull<c_void>) -> NonNull<c_void> {
    // SAFETY: promised by the caller; TensorRT never hands out objects without implementation.
    unsafe { *object.as_ptr().cast::<NonNull<c_void>>().add(1) }
}

impl Drop for Object {
    fn drop(&mut self) {
        type Delete = unsafe extern "C" fn(NonNull<c_void>);
        // SAFETY: we own the object, and the slot holds its deleting destructor.
        unsafe { method::<Delete>(self.pointer, self.delete_slot)(self.pointer) }
    }
}

/// Copies a C string; empty for null.
///
/// # Safety
/// `text` is null or a NUL-terminated string that lives during the call.
pub(super) unsafe fn text(text: *const std::ffi::c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: promised by the caller.
    unsafe { std::ffi::CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_and_unaligned_pointers_are_failures() {
        for (address, ok) in [
            (0usize, false),
            (0x228, false),
            (4095, false),
            (4096, true),
            (0x1001, false),
            (0x7000_0000, true),
        ] {
            assert_eq!(valid(address as *mut c_void).is_some(), ok, "{address:#x}");
        }
    }

    #[test]
    fn dims_are_72_bytes_and_checked() {
        assert_eq!(size_of::<Dims>(), 72);
        assert_eq!(Dims::new(&[1, 2, 3]).unwrap().shape().unwrap(), [1, 2, 3]);
        assert!(Dims::new(&[1; 9]).is_none());
        assert!(Dims { count: -1, extent: [0; 8] }.shape().is_none());
        assert!(Dims { count: 9, extent: [0; 8] }.shape().is_none());
    }
}
