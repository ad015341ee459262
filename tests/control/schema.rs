//! A check of values against JSON Schemas, for the keywords that the daemon uses.

use serde_json::Value;

/// Checks `value` against `schema`. The error names the violated keyword.
pub fn check(schema: &Value, value: &Value) -> Result<(), String> {
    let fail = |why: &str| Err(format!("{why}: {value} against {schema}"));
    let keywords = schema.as_object().ok_or("a schema is an object")?;
    for (keyword, wanted) in keywords {
        match keyword.as_str() {
            "type" => {
                let types: Vec<&Value> = wanted.as_array().map_or(vec![wanted], |all| all.iter().collect());
                if !types.iter().any(|wanted| has_type(value, wanted.as_str().unwrap_or_default())) {
                    return fail("type");
                }
            }
            "enum" if !wanted.as_array().is_some_and(|all| all.contains(value)) => return fail("enum"),
            "const" if wanted != value => return fail("const"),
            "minimum" if value.as_f64().is_some_and(|n| n < wanted.as_f64().unwrap()) => return fail("minimum"),
            "maximum" if value.as_f64().is_some_and(|n| n > wanted.as_f64().unwrap()) => return fail("maximum"),
            "minItems" if value.as_array().is_some_and(|all| (all.len() as u64) < wanted.as_u64().unwrap()) => {
                return fail("minItems");
            }
            "properties" => {
                for (name, schema) in wanted.as_object().expect("properties are an object") {
                    value.get(name).map_or(Ok(()), |value| check(schema, value))?;
                }
            }
            "required" => {
                let all = wanted.as_array().expect("a list of names");
                if all.iter().any(|name| value.get(name.as_str().unwrap()).is_none()) {
                    return fail("required");
                }
            }
            "additionalProperties" => {
                assert_eq!(wanted, false, "no other value is used");
                let known = keywords["properties"].as_object().expect("properties are an object");
                if value.as_object().is_some_and(|value| value.keys().any(|name| !known.contains_key(name))) {
                    return fail("additionalProperties");
                }
            }
            "items" => value.as_array().into_iter().flatten().try_for_each(|item| check(wanted, item))?,
            "oneOf" => {
                let all = wanted.as_array().expect("a list of schemas");
                if all.iter().filter(|schema| check(schema, value).is_ok()).count() != 1 {
                    return fail("oneOf");
                }
            }
            "enum" | "const" | "minimum" | "maximum" | "minItems" => {}
            other => return Err(format!("the keyword {other} is not known here")),
        }
    }
    Ok(())
}

fn has_type(value: &Value, wanted: &str) -> bool {
    match wanted {
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "null" => value.is_null(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("the type {other} is not known here"),
    }
}
