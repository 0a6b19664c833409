defmodule Bridge.JSON do
  @moduledoc """
  JSON as the wire has it: exact integers of any size, `1.0` that stays a float, and nothing that JSON lacks.

  Text is read by what there is: Elixir's own `JSON`, OTP's `:json`, Jason or `:jiffy`. It is written here, so that all of
  them write the same and refuse the same.

      iex> Bridge.JSON.decode(~s({"a": [1, 1.0, null, 36893488147419103232]}))
      {:ok, %{"a" => [1, 1.0, nil, 36893488147419103232]}}
      iex> Bridge.JSON.decode("[1,]")
      {:error, :invalid}
      iex> Bridge.JSON.canonical(%{"b" => 1.0, "a" => [true, nil]})
      ~s({"a":[true,null],"b":1.0})
  """

  @typedoc "What JSON has: objects are maps with string keys, null is nil."
  @type t :: nil | boolean() | integer() | float() | String.t() | [t()] | %{optional(String.t()) => t()}

  alias Bridge.Error

  # By the function too, for there is a package whose module is called JSON.
  @backends [{JSON, 3}, {:json, 3}, {Jason, 2}, {:jiffy, 2}]

  # As Python's own limit.
  @max_digits 4300
  @most Integer.pow(10, @max_digits)

  @doc """
  The module that reads JSON, or that there is none. Looked for when it is first needed, not when Bridge is compiled: Mix
  may compile Bridge before the library that is to serve it.
  """
  @spec backend() :: {:ok, module()} | {:error, Error.t()}
  def backend do
    with nil <- :persistent_term.get(__MODULE__, nil), nil <- find() do
      Error.error(:kernel_start_failed, "there is no JSON library",
        remedy:
          "Use Elixir 1.18 or OTP 27, or add {:jason, \"~> 1.4\"} to your dependencies, or install erlang-jiffy (Debian)."
      )
    else
      module -> {:ok, module}
    end
  end

  defp find do
    found = Enum.find(@backends, fn {module, arity} -> Code.ensure_loaded?(module) and exports?(module, arity) end)

    with {module, _arity} <- found do
      :persistent_term.put(__MODULE__, module)
      module
    end
  end

  defp exports?(module, arity), do: function_exported?(module, :decode, arity)

  @doc """
  Reads one JSON text. Of members with the same name the last one counts, as in Python.

  Strings are copies: one that is kept keeps no message alive. More than 4,300 digits in a row are no number, as in Python:
  reading them takes time that grows with the square of their count.
  """
  @spec decode(binary()) :: {:ok, t()} | {:error, :invalid}
  def decode("{}"), do: {:ok, %{}}

  def decode(text) when is_binary(text) do
    if long_run?(text, @max_digits) and long_number?(text, 0), do: {:error, :invalid}, else: read(text)
  end

  # Every so many bytes there is one of such a run: almost nothing of a text is looked at for it.
  defp long_run?(text, at) when at >= byte_size(text), do: false

  defp long_run?(text, at) do
    (digit?(text, at) and run(text, at, 1, @max_digits) + run(text, at - 1, -1, @max_digits) > @max_digits) or
      long_run?(text, at + @max_digits)
  end

  defp run(_text, _at, _step, 0), do: 0
  defp run(text, at, step, left), do: if(digit?(text, at), do: 1 + run(text, at + step, step, left - 1), else: 0)

  defp digit?(text, at), do: at >= 0 and at < byte_size(text) and :binary.at(text, at) in ?0..?9

  # Those in a string do no harm.
  defp long_number?(_text, digits) when digits > @max_digits, do: true
  defp long_number?(<<char, rest::binary>>, digits) when char in ?0..?9, do: long_number?(rest, digits + 1)
  defp long_number?(<<?", rest::binary>>, _digits), do: rest |> after_string() |> long_number?(0)
  defp long_number?(<<_char, rest::binary>>, _digits), do: long_number?(rest, 0)
  defp long_number?(<<>>, _digits), do: false

  defp after_string(<<?\\, _escaped, rest::binary>>), do: after_string(rest)
  defp after_string(<<?", rest::binary>>), do: rest
  defp after_string(<<_char, rest::binary>>), do: after_string(rest)
  defp after_string(<<>>), do: <<>>

  defp read(text) do
    case backend() do
      {:ok, module} -> read(module, text)
      {:error, error} -> raise error
    end
  end

  # Called by a variable, not by its name: it is found here and not depended on, and Mix would say so.
  defp read(:jiffy = module, text) do
    {:ok, module.decode(text, [:return_maps, :use_nil, :copy_strings])}
  catch
    # What is no JSON is an error, and a number that no float can hold is one too.
    :error, _reason -> {:error, :invalid}
  end

  defp read(Jason = module, text) do
    with {:error, _reason} <- module.decode(text, strings: :copy), do: {:error, :invalid}
  end

  defp read(module, text) when module in [JSON, :json] do
    case parse(module, text) do
      {:error, _reason} -> {:error, :invalid}
      {term, _acc, rest} -> if blank?(rest), do: {:ok, term}, else: {:error, :invalid}
    end
  end

  # Members are collected newest first.
  @decoders %{
    null: nil,
    string: &:binary.copy/1,
    object_push: &__MODULE__.__push__/3,
    object_finish: &__MODULE__.__finish__/2
  }

  @doc false
  def __push__(key, value, members), do: [{key, value} | members]
  @doc false
  def __finish__(members, outer), do: {:maps.from_list(:lists.reverse(members)), outer}

  defp parse(JSON = module, text), do: module.decode(text, nil, Map.to_list(@decoders))

  defp parse(:json = module, text) do
    module.decode(text, nil, @decoders)
  catch
    :error, reason -> {:error, reason}
  end

  defp blank?(<<char, rest::binary>>) when char in [?\s, ?\t, ?\r, ?\n], do: blank?(rest)
  defp blank?(rest), do: rest == ""

  @doc """
  Writes a term, compact. Raises `ArgumentError` for what JSON lacks: other atoms, tuples, structs, keys that are no
  strings, binaries that are no UTF-8, and integers of more than 4,300 digits.
  """
  @spec encode!(t()) :: iodata()
  def encode!(term), do: write(term, false)

  @doc "The one text of a term: compact, the members of objects in the order of their names' bytes."
  @spec canonical(t()) :: binary()
  def canonical(term), do: term |> write(true) |> IO.iodata_to_binary()

  defp write(text, _sorted?) when is_binary(text), do: string(text)

  defp write(number, _sorted?) when is_integer(number) and number < @most and number > -@most,
    do: Integer.to_string(number)

  # Not shown: it would be written for that.
  defp write(number, _sorted?) when is_integer(number),
    do: raise(ArgumentError, "JSON has no room for an integer of more than #{@max_digits} digits")

  defp write(nil, _sorted?), do: "null"
  defp write(true, _sorted?), do: "true"
  defp write(false, _sorted?), do: "false"
  defp write(number, _sorted?) when is_float(number), do: :erlang.float_to_binary(number, [:short])
  defp write([], _sorted?), do: "[]"
  defp write([first | rest], sorted?), do: [?[, write(first, sorted?) | items(rest, sorted?)]
  defp write(struct, _sorted?) when is_struct(struct), do: refuse(struct, "a struct")
  defp write(map, _sorted?) when map_size(map) == 0, do: "{}"

  defp write(map, sorted?) when is_map(map) do
    # A list of a small map is in order as it is; sorting it again is one pass.
    members = :maps.to_list(map)
    [{name, value} | rest] = if sorted?, do: :lists.sort(members), else: members
    [?{, name(name), ?:, write(value, sorted?) | members(rest, sorted?)]
  end

  defp write(other, _sorted?), do: refuse(other, "a term")

  defp items([], _sorted?), do: "]"
  defp items([item | rest], sorted?), do: [?,, write(item, sorted?) | items(rest, sorted?)]
  defp items(tail, _sorted?), do: refuse(tail, "the tail of an improper list")

  defp members([], _sorted?), do: "}"

  defp members([{name, value} | rest], sorted?),
    do: [?,, name(name), ?:, write(value, sorted?) | members(rest, sorted?)]

  defp name(name) when is_binary(name), do: string(name)
  defp name(other), do: refuse(other, "a name")

  defp string(text), do: [?", escape(text, text, 0, 0), ?"]

  defguardp is_plain(char) when char >= 0x20 and char < 0x80 and char != ?" and char != ?\\

  # Walks `text` and leaves alone the `length` bytes from `start` on, until something has to be escaped.
  defp escape(<<a, b, c, d, rest::binary>>, text, start, length)
       when is_plain(a) and is_plain(b) and is_plain(c) and is_plain(d),
       do: escape(rest, text, start, length + 4)

  defp escape(<<char, rest::binary>>, text, start, length) when is_plain(char),
    do: escape(rest, text, start, length + 1)

  defp escape(<<char::utf8, rest::binary>>, text, start, length) when char >= 0x10000,
    do: escape(rest, text, start, length + 4)

  defp escape(<<char::utf8, rest::binary>>, text, start, length) when char >= 0x800,
    do: escape(rest, text, start, length + 3)

  defp escape(<<char::utf8, rest::binary>>, text, start, length) when char >= 0x80,
    do: escape(rest, text, start, length + 2)

  defp escape(<<char, rest::binary>>, text, start, length) when char < 0x80,
    do: [binary_part(text, start, length), escaped(char) | escape(rest, text, start + length + 1, 0)]

  defp escape(<<>>, text, 0, _length), do: text
  defp escape(<<>>, text, start, length), do: binary_part(text, start, length)
  defp escape(_rest, text, _start, _length), do: refuse(text, "a binary that is no UTF-8")

  defp escaped(?"), do: ~S(\")
  defp escaped(?\\), do: ~S(\\)
  defp escaped(?\n), do: ~S(\n)
  defp escaped(?\r), do: ~S(\r)
  defp escaped(?\t), do: ~S(\t)
  defp escaped(char) when char < 0x10, do: ["\\u000", Integer.to_string(char, 16)]
  defp escaped(char), do: ["\\u00", Integer.to_string(char, 16)]

  @spec refuse(term(), String.t()) :: no_return()
  defp refuse(term, what) do
    shown = inspect(term, limit: 5, printable_limit: 50)
    raise ArgumentError, "JSON has no room for #{what}: #{shown}"
  end
end
