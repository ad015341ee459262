//! Severity and consequence of a defect, and the macro that expands the table of defects.

/// Consequence of a defect: the ways in which programs may still use the image.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Consequence {
    /// The image is read and written. An open of its chain logs a warning, unless the defect is a note.
    Warning,
    /// The image is read, and not written until the defect is repaired.
    NotWritable,
    /// The image is neither read nor written.
    NotReadable,
}

/// Severity of a defect.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Severity {
    /// An observation that violates no rule, but may explain a violation.
    Note,
    /// The disk reads as it should, but another program may fail on the image.
    Cosmetic,
    /// Space in the file to which no structure refers.
    Leak,
    /// The disk may read wrong data, or cannot be served, until the defect is repaired.
    Corruption,
}

/// Declares [`Defect`](super::Defect) and its methods from a table. A row is
///
/// ```text
/// /// Doc comment.
/// Variant { fields } [name, rule, severity, consequence, repairable, kind of error, offset] "sentence", arguments;
/// ```
///
/// - name: the name of the defect in `check --json`
/// - rule: the rule of `docs/format.md`, section 7; `_` for a defect without a numbered rule
/// - repairable: whether `check --repair` repairs it without guessing
/// - offset: the byte offset of the defect, as an expression over the fields; `none`; or `relative at` for a defect
///   that a decoder reports with `at: 0`, since decoders get bytes without their file offset. The caller sets `at` with
///   `with_base_offset`.
macro_rules! defects {
    (
        $(#[$outer:meta])*
        pub enum Defect {
            $(
                $(#[$doc:meta])*
                $variant:ident $({ $($field:ident: $type:ty),* })?
                [$name:literal, $rule:tt, $severity:ident, $consequence:ident, $repairable:literal, $error:ident, $($offset:tt)+]
                $text:literal $(, $argument:expr)*;
            )*
        }
    ) => {
        $(#[$outer])*
        pub enum Defect {
            $($(#[$doc])* $variant $({ $($field: $type),* })?,)*
        }

        /// The name and the rule of each row.
        #[cfg(test)]
        const ROWS: &[(&str, Option<&str>)] = &[$(($name, defects!(@rule $rule)),)*];

        impl Defect {
            /// Returns the names of the rows that are repairable.
            #[cfg(all(test, feature = "sim"))]
            pub(crate) fn repairable_kinds() -> impl Iterator<Item = &'static str> {
                [$(($name, $repairable)),*].into_iter().filter(|(_, repairable)| *repairable).map(|(name, _)| name)
            }

            /// Returns the name of the defect, as `check --json` prints it.
            pub fn kind(&self) -> &'static str {
                match self {
                    $(Defect::$variant { .. } => $name,)*
                }
            }

            /// Returns the severity.
            pub fn severity(&self) -> Severity {
                match self {
                    $(Defect::$variant { .. } => Severity::$severity,)*
                }
            }

            /// Returns the consequence of the defect for the use of the image.
            pub fn consequence(&self) -> Consequence {
                match self {
                    $(Defect::$variant { .. } => Consequence::$consequence,)*
                }
            }

            /// Returns whether `check --repair` repairs the defect without guessing.
            pub fn repairable(&self) -> bool {
                match self {
                    $(Defect::$variant { .. } => $repairable,)*
                }
            }

            fn error_kind(&self) -> ErrorKind {
                match self {
                    $(Defect::$variant { .. } => ErrorKind::$error,)*
                }
            }

            /// Returns the byte offset of the defect in the file, if it has one.
            #[allow(unused_variables, reason = "each row uses some of its fields")]
            pub fn offset(&self) -> Option<u64> {
                match self {
                    $(Defect::$variant $({ $($field),* })? => defects!(@offset $($offset)+),)*
                }
            }

            /// Returns the defect of a structure that begins at byte `base` of the file.
            ///
            /// Decoders get bytes without their file offset, and report offset 0.
            #[must_use]
            #[allow(unused_variables, reason = "each row uses some of its fields")]
            pub fn with_base_offset(mut self, base: u64) -> Defect {
                match &mut self {
                    $(Defect::$variant $({ $($field),* })? => defects!(@set base, $($offset)+),)*
                }
                self
            }
        }

        impl fmt::Display for Defect {
            #[allow(unused_variables, reason = "each row uses some of its fields")]
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self {
                    $(Defect::$variant $({ $($field),* })? => write!(f, $text $(, $argument)*),)*
                }
            }
        }
    };
    (@rule _) => { None };
    (@rule $rule:ident) => { Some(stringify!($rule)) };
    (@offset none) => { None };
    (@offset relative $at:ident) => { Some(*$at) };
    (@offset $offset:expr) => { Some($offset) };
    (@set $base:ident, relative $at:ident) => { *$at = $base };
    (@set $base:ident, $($other:tt)+) => { {} };
}

pub(super) use defects;
