defmodule Bridge.Schema do
  @moduledoc """
  JSON Schema (2020-12): `check/1` when a schema is taken, `validate/2` for what does not fit about a value.

  Nothing is fetched: references lead into the schema itself. As in Python and Elixir, and unlike JSON Schema, `1.0` is
  no integer. `format` and unknown keywords are remarks. `unevaluatedProperties`, `unevaluatedItems` and `$dynamicRef`,
  which this host does not follow, are refused rather than passed over.

  A value is judged as the JSON that stands for it: a tuple is a list, a moment its ISO text, a record an object, keys
  that are atoms are strings. What has no such form (an array, a reference) fits no schema.

      iex> schema = %{"type" => "object", "properties" => %{"n" => %{"type" => "integer", "minimum" => 1}}}
      iex> Bridge.Schema.check(schema)
      :ok
      iex> Bridge.Schema.validate(schema, %{n: 2})
      :ok
      iex> Bridge.Schema.validate(schema, %{n: 0})
      {:error, [{~S(["n"]), "0 is less than 1"}]}
      iex> Bridge.Schema.check(%{"type" => "int"})
      {:error, ~S("type" must be one of array, boolean, integer, null, number, object, string, or a list of them)}
  """

  alias Bridge.Schema.{Check, Judge}
  alias Bridge.Value.Plain

  @type problem :: {path :: String.t(), message :: String.t()}

  @doc "Whether it is a schema that this host follows; if not, why."
  @spec check(term()) :: :ok | {:error, String.t()}
  def check(schema) do
    with :ok <- Check.check(schema), do: Judge.ends?(schema)
  end

  @doc """
  What does not fit about a value: at most 16 of it, each with its path. The schema must have passed `check/1`.

      iex> Bridge.Schema.validate(%{"items" => %{"type" => "integer"}}, [1, "a", 2.0])
      {:error, [{"[1]", ~S("a" is not of type integer)}, {"[2]", "2.0 is not of type integer"}]}
  """
  @spec validate(map() | boolean(), term()) :: :ok | {:error, [problem()]}
  def validate(schema, value) do
    case Plain.of(value) do
      {:ok, plain} -> Judge.judge(schema, plain)
      {:error, path, reason} -> {:error, [{path, "this value " <> reason}]}
    end
  end
end
