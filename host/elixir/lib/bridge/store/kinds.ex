defmodule Bridge.Store.Kinds do
  @moduledoc false
  # The kinds of variable that JSON Schema cannot say: tensor, embedding, module. They are written
  # `{"x-bridge": "tensor", …}`, so that a host in another language reads them too.

  @kind "x-bridge"
  @own %{"tensor" => ~w(dtype shape), "embedding" => ~w(dimensions), "module" => ~w(choices)}
  @dtype ~r/\A[<>|][biufcSUVmM][0-9]{1,10}(\[[0-9]{0,9}[a-zA-Zμ]{1,2}\])?\z/u
  @dotted ~r/\A[^\W\d]\w*(\.[^\W\d]\w*)*\z/u
  @names %{
    "bool" => "|b1",
    "int8" => "|i1",
    "int16" => "<i2",
    "int32" => "<i4",
    "int64" => "<i8",
    "uint8" => "|u1",
    "uint16" => "<u2",
    "uint32" => "<u4",
    "uint64" => "<u8",
    "float16" => "<f2",
    "float32" => "<f4",
    "float64" => "<f8",
    "complex64" => "<c8",
    "complex128" => "<c16"
  }
  @letters %{f: "f", s: "i", u: "u", c: "c"}

  @spec names() :: [String.t()]
  def names, do: Map.keys(@own)

  defp own(kind), do: Map.fetch!(@own, kind)

  @doc "The schema of a kind by its own constraints."
  @spec named(String.t(), [{String.t(), term()}]) :: {:ok, map()} | {:error, String.t()}
  def named(kind, constraints) do
    Enum.reduce_while(constraints, {:ok, %{@kind => kind}}, fn {name, value}, {:ok, schema} ->
      cond do
        name not in own(kind) ->
          {:halt,
           {:error, "#{name} does not fit #{kind}, which takes #{Enum.join(own(kind), ", ")}, default, description"}}

        value == nil ->
          {:cont, {:ok, schema}}

        name == "dtype" ->
          {:cont, {:ok, Map.put(schema, name, dtype(value))}}

        is_tuple(value) ->
          {:cont, {:ok, Map.put(schema, name, Tuple.to_list(value))}}

        true ->
          {:cont, {:ok, Map.put(schema, name, value)}}
      end
    end)
  end

  defp dtype({letter, bits}) when is_map_key(@letters, letter) and is_integer(bits) do
    bytes = div(bits, 8)
    "#{if bytes == 1, do: "|", else: "<"}#{@letters[letter]}#{bytes}"
  end

  defp dtype(name) when is_atom(name), do: dtype(Atom.to_string(name))
  defp dtype(name), do: Map.get(@names, name, name)

  @doc "Whether a kind is described so."
  @spec check(map(), [String.t()]) :: :ok | {:error, String.t()}
  def check(%{@kind => kind} = schema, remarks) do
    cond do
      not is_map_key(@own, kind) ->
        {:error,
         "there is no kind #{inspect(kind, printable_limit: 60)} of variable: there are #{Enum.join(names(), ", ")}"}

      (extra = Map.keys(schema) -- [@kind | own(kind) ++ remarks]) != [] ->
        {:error, "a #{kind} is not described by #{Enum.join(extra, ", ")}, but by #{Enum.join(own(kind), ", ")}"}

      true ->
        check_own(schema)
    end
  end

  defp check_own(%{"dtype" => dtype}) when not is_binary(dtype), do: {:error, "dtype is written as in '<f4'"}

  defp check_own(%{@kind => "tensor"} = schema) do
    shape = schema["shape"]

    cond do
      is_binary(schema["dtype"]) and not (schema["dtype"] =~ @dtype) ->
        {:error, "dtype is written as in '<f4', or float32"}

      shape != nil and not (is_list(shape) and Enum.all?(shape, &size?/1)) ->
        {:error, "shape is a list of sizes, nil for any size"}

      true ->
        :ok
    end
  end

  defp check_own(%{@kind => "embedding", "dimensions" => n}) when not (is_integer(n) and n > 0) do
    {:error, "dimensions is how many numbers there are"}
  end

  defp check_own(%{@kind => "module", "choices" => choices}) do
    if is_list(choices) and choices != [] and Enum.all?(choices, &dotted?/1) do
      :ok
    else
      {:error, "choices is a list of dotted names of classes"}
    end
  end

  defp check_own(_schema), do: :ok

  defp size?(size), do: size == nil or (is_integer(size) and size >= 0)
  defp dotted?(name), do: is_binary(name) and name =~ @dotted

  @doc "What does not fit about a value of that kind, nil if it fits."
  @spec problem(map(), term(), String.t()) :: String.t() | nil
  def problem(%{@kind => "tensor"} = schema, value, type) do
    case array(value) do
      nil -> ": a value of type #{type} is no array"
      found -> dtype_problem(schema["dtype"], found) || shape_problem(schema["shape"], found)
    end
  end

  def problem(%{@kind => "embedding"} = schema, value, type) do
    dimensions = schema["dimensions"]

    case array(value) do
      nil ->
        bounds = if dimensions, do: %{"minItems" => dimensions, "maxItems" => dimensions}, else: %{}
        numbers = Map.merge(%{"type" => "array", "items" => %{"type" => "number"}}, bounds)

        case Bridge.Schema.validate(numbers, value) do
          :ok -> nil
          {:error, _problems} when not is_list(value) -> ": a value of type #{type} is no list of numbers and no array"
          {:error, [{path, reason} | _]} -> "#{path}: #{reason}"
        end

      %{dtype: <<_order, "f", _size::binary>>} = found ->
        shape_problem([dimensions], found)

      found ->
        ": an array of #{inspect(found.dtype)} is none of floats"
    end
  end

  def problem(%{@kind => "module"} = schema, value, type) do
    choices = schema["choices"]

    case value do
      %Bridge.Ref{class: class} ->
        if choices != nil and class not in choices do
          ": an instance of #{class || "a class that is not said"} is none of #{Enum.join(choices, ", ")}"
        end

      text when is_binary(text) ->
        cond do
          not dotted?(text) -> ": #{inspect(text, printable_limit: 40)} is no dotted name of a class and no instance"
          choices != nil and text not in choices -> ": #{inspect(text)} is none of #{Enum.join(choices, ", ")}"
          true -> nil
        end

      _other ->
        ": a value of type #{type} is no dotted name of a class and no instance"
    end
  end

  defp dtype_problem(wanted, %{dtype: dtype}) do
    if wanted not in [nil, dtype],
      do: ": an array of #{inspect(dtype, printable_limit: 40)} is none of #{inspect(wanted)}"
  end

  defp shape_problem(nil, _found), do: nil

  defp shape_problem(wanted, %{shape: shape}) do
    fits? = length(wanted) == length(shape) and Enum.all?(Enum.zip(wanted, shape), fn {n, m} -> n in [nil, m] end)

    unless fits? do
      sizes = Enum.map_join(wanted, ", ", &(&1 || "any"))
      ": an array of shape #{inspect(shape, charlists: :as_lists)} has not the shape [#{sizes}]"
    end
  end

  defp array({{letter, bits}, shape, data}) when is_map_key(@letters, letter) and is_tuple(shape) and is_binary(data) do
    %{dtype: dtype({letter, bits}), shape: Tuple.to_list(shape)}
  end

  defp array(%Bridge.NDArray{dtype: dtype, shape: shape}), do: %{dtype: dtype, shape: Tuple.to_list(shape)}
  defp array(_value), do: nil
end
