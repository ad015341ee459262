//! What is declared of a defect: how bad it is, what follows for programs, and the macro that reads the table of defects.

/// What a defect means for programs that open the image.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Consequence {
    /// The image is read and written. Programs that read or write its data log a warning.
    Warning,
    /// The image is read, and not written until the defect is mended.
    NotWritable,
    /// The image is neither read nor written.
    NotReadable,
}

/// How bad a defect is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Severity {
    /// Nothing is wrong; somebody may want to know.
    Note,
    /// The disk reads as it should; another program may stumble.
    Cosmetic,
    /// Space that nothing refers to.
    Leak,
    /// The disk cannot be trusted, or not be served, until mended.
    Corruption,
}

/// Declares [`Defect`](super::Defect) and all that follows from its table. A row is
///
/// ```text
/// /// Doc comment.
/// Variant { fields } [name, rule, severity, consequence, repairable, kind of error, offset] "sentence", arguments;
/// ```
///
/// - name: of the variant, as `check --json` prints it
/// - rule: of `docs/format.md`, section 7; `_` if none of them is broken
/// - repairable: whether `check --repair` mends it without guessing
/// - offset: the byte that it is about, as an expression over the fields; `none`; or `relative at` if the decoder, which
///   sees a structure without its place, reports 0 in the field `at` and its caller calls `with_base_offset`
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

        /// Name and broken rule of each row.
        #[cfg(test)]
        const ROWS: &[(&str, Option<&str>)] = &[$(($name, defects!(@rule $rule)),)*];

        impl Defect {
            /// The name of the kind of defect, for programs.
            pub fn kind(&self) -> &'static str {
                match self {
                    $(Defect::$variant { .. } => $name,)*
                }
            }

            /// How bad it is.
            pub fn severity(&self) -> Severity {
                match self {
                    $(Defect::$variant { .. } => Severity::$severity,)*
                }
            }

            /// Whether the image may be read and written all the same.
            pub fn consequence(&self) -> Consequence {
                match self {
                    $(Defect::$variant { .. } => Consequence::$consequence,)*
                }
            }

            /// Whether `check --repair` mends it without guessing.
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

            /// The byte offset it is about, where there is one.
            #[allow(unused_variables, reason = "each row uses some of its fields")]
            pub fn offset(&self) -> Option<u64> {
                match self {
                    $(Defect::$variant $({ $($field),* })? => defects!(@offset $($offset)+),)*
                }
            }

            /// The same defect in a structure that begins at byte `base` of the file.
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
