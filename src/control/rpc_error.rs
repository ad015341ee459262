//! Errors of the protocol: the codes of JSON-RPC for malformed requests, and one code for each kind of [`Error`].

use std::error::Error as _;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind};

/// The message is not JSON.
pub(super) const PARSE_ERROR: i64 = -32700;
/// The message exceeds a limit, or is JSON but no request.
pub(super) const INVALID_REQUEST: i64 = -32600;
/// The method does not exist.
pub(super) const METHOD_NOT_FOUND: i64 = -32601;
/// The parameters do not match the schema of the method.
pub(super) const INVALID_PARAMS: i64 = -32602;
/// A defect of the daemon.
pub(super) const INTERNAL_ERROR: i64 = -32603;

/// Codes of the kinds of errors. Code -9 ("Cancelled") is reserved for operations that a client cancels.
const KINDS: &[(ErrorKind, i64)] = &[
    (ErrorKind::Refused, -1),
    (ErrorKind::Busy, -2),
    (ErrorKind::NotFound, -3),
    (ErrorKind::NoSpace, -4),
    (ErrorKind::Io, -5),
    (ErrorKind::Poisoned, -6),
    (ErrorKind::Unsupported, -7),
    (ErrorKind::Invalid, -8),
];

/// The member `error` of an answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct RpcError {
    pub(super) code: i64,
    pub(super) message: String,
    /// Present for the project's own codes only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) data: Option<ErrorData>,
}

/// Details of an error with one of the project's own codes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct ErrorData {
    /// The file that the error concerns.
    pub(super) path: Option<String>,
    /// The byte offset in the file.
    pub(super) offset: Option<u64>,
    /// The causes, outermost first.
    pub(super) causes: Vec<String>,
    /// What the user can do.
    pub(super) hint: Option<String>,
}

impl RpcError {
    /// Creates an error with one of JSON-RPC's own codes, without details.
    pub(super) fn of_form(code: i64, message: impl Into<String>) -> RpcError {
        RpcError { code, message: message.into(), data: None }
    }

    /// Adds a hint to an error that has details. Other errors stay as they are.
    pub(super) fn with_hint(mut self, hint: impl Into<String>) -> RpcError {
        if let Some(data) = &mut self.data {
            data.hint = Some(hint.into());
        }
        self
    }
}

impl From<Error> for RpcError {
    fn from(e: Error) -> RpcError {
        let code = KINDS.iter().find(|(kind, _)| *kind == e.kind()).map_or(INTERNAL_ERROR, |(_, code)| *code);
        let mut causes = Vec::new();
        let mut next = e.source();
        while let Some(cause) = next {
            causes.push(cause.to_string());
            next = cause.source();
        }
        let path = e.path().map(|path| path.display().to_string());
        let data = ErrorData { path, offset: e.offset(), causes, hint: None };
        RpcError { code, message: e.message().to_owned(), data: Some(data) }
    }
}

impl From<RpcError> for Error {
    /// Converts the error of an answer for the user of `diffdisk ctl`.
    fn from(e: RpcError) -> Error {
        let kind = KINDS.iter().find(|(_, code)| *code == e.code).map(|(kind, _)| *kind);
        let kind = kind.unwrap_or(if e.code == METHOD_NOT_FOUND { ErrorKind::Unsupported } else { ErrorKind::Refused });
        let Some(data) = e.data else { return Error::new(kind, e.message) };
        let message = data.hint.map_or(e.message.clone(), |hint| format!("{}: {hint}", e.message));
        let mut error = Error::new(kind, message);
        if let Some(path) = data.path {
            error = error.at_path(path);
        }
        if let Some(offset) = data.offset {
            error = error.at_offset(offset);
        }
        if data.causes.is_empty() { error } else { error.caused_by(data.causes.join(": ")) }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn an_error_keeps_kind_path_offset_and_causes_on_its_way() {
        let failed = Error::io("cannot read", io::Error::from_raw_os_error(libc::EIO)).at_path("/a.vhd").at_offset(512);
        let line = failed.line();
        let rpc = RpcError::from(failed);
        assert_eq!(rpc.code, -5);
        let data = rpc.data.clone().unwrap();
        assert_eq!((data.path.as_deref(), data.offset, data.causes.len()), (Some("/a.vhd"), Some(512), 1));
        let back = Error::from(rpc);
        assert_eq!((back.kind(), back.line()), (ErrorKind::Io, line));
    }

    #[test]
    fn every_kind_has_a_code_of_its_own() {
        use ErrorKind::{Busy, Invalid, Io, NoSpace, NotFound, Poisoned, Refused, Unsupported};
        let kinds = [Refused, Busy, NotFound, NoSpace, Io, Poisoned, Unsupported, Invalid];
        for (kind, code) in kinds.into_iter().zip((-8..=-1).rev()) {
            let rpc = RpcError::from(Error::new(kind, "x"));
            assert_eq!(rpc.code, code);
            assert_eq!(Error::from(rpc.with_hint("do y")).line(), "x: do y");
        }
        assert_eq!(Error::from(RpcError::of_form(INVALID_PARAMS, "x")).kind(), ErrorKind::Refused);
    }
}
