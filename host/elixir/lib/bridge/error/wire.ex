defmodule Bridge.Error.Wire do
  @moduledoc false
  # Errors and the `error` member of a JSON-RPC response, one from the other; pure. The counterpart of
  # kernel/bridge_kernel/contract/errors.py: the same clipping, the same texts.

  alias Bridge.Error

  @max_frames 64
  @max_text 16_384

  @doc "The error object that travels."
  @spec to_wire(Error.t()) :: map()
  def to_wire(%Error{} = error) do
    %{
      "code" => error.code,
      "message" => clip(text(error)),
      "data" => %{
        "type" => clip(error.type),
        "message" => clip(error.message),
        "traceback" => error.traceback |> Enum.take(-@max_frames) |> Enum.map(&frame_out/1),
        "retryable" => error.retryable,
        "remedy" => clip(error.remedy)
      }
    }
  end

  @doc """
  The error that an error object stands for. A code that this host does not know is an `:internal_error`, and so is what
  is no error object at all.
  """
  @spec from_wire(term()) :: Error.t()
  def from_wire(object) do
    case read(object) do
      {:ok, error} -> error
      :error -> Error.new(:internal_error, "the kernel sent an error object that is none")
    end
  end

  @doc "As `from_wire/1`, for those who must know whether it was an error object."
  @spec read(term()) :: {:ok, Error.t()} | :error
  def read(%{"code" => code, "message" => message} = object) when is_integer(code) and is_binary(message) do
    case Map.get(object, "data") do
      nil -> {:ok, Error.new(Error.name_of(code), message)}
      data -> read_data(Error.name_of(code), data)
    end
  end

  def read(_other), do: :error

  # Whether it may be run again is the contract's to say, not the peer's.
  defp read_data(name, %{"type" => type, "message" => message} = data) when is_binary(type) and is_binary(message) do
    remedy = Map.get(data, "remedy", "")
    retryable = Map.get(data, "retryable", false)

    with true <- is_binary(remedy) and is_boolean(retryable),
         {:ok, frames} <- read_frames(Map.get(data, "traceback", []), []) do
      named = if type == "", do: [], else: [type: type]
      {:ok, Error.new(name, message, [remedy: remedy, traceback: frames] ++ named)}
    else
      _malformed -> :error
    end
  end

  defp read_data(_name, _data), do: :error

  defp read_frames([], frames), do: {:ok, Enum.reverse(frames)}

  defp read_frames([%{"file" => file, "line" => line, "function" => function} = frame | rest], frames)
       when is_binary(file) and is_integer(line) and is_binary(function) do
    case Map.get(frame, "code", "") do
      code when is_binary(code) ->
        read_frames(rest, [%{file: file, line: line, function: function, code: code} | frames])

      _other ->
        :error
    end
  end

  defp read_frames(_other, _frames), do: :error

  @doc """
  The error that reports an exception of the host's code, with the frames of its stacktrace, outermost first.

  A `Bridge.Error` stays what it is, and a `:remote_error` or a `:tool_error` that passes through gets the frames it
  passed through before its own.
  """
  @spec from_exception(Exception.t(), Exception.stacktrace(), atom()) :: Error.t()
  def from_exception(exception, stacktrace, name \\ :tool_error)

  def from_exception(%Error{name: passed} = error, stacktrace, _name) when passed in [:remote_error, :tool_error],
    do: %{error | traceback: Enum.take(frames(stacktrace) ++ error.traceback, -@max_frames)}

  def from_exception(%Error{} = error, _stacktrace, _name), do: error

  def from_exception(exception, stacktrace, name) when is_exception(exception) do
    type = inspect(exception.__struct__)
    Error.new(name, clip(Exception.message(exception)), type: clip(type), traceback: frames(stacktrace))
  end

  @doc "As `from_exception/3`, for whatever was caught: also what was thrown, and an exit."
  @spec from_caught(:error | :exit | :throw, term(), Exception.stacktrace(), atom()) :: Error.t()
  def from_caught(kind, reason, stacktrace, name \\ :tool_error)

  def from_caught(:error, reason, stacktrace, name),
    do: :error |> Exception.normalize(reason, stacktrace) |> from_exception(stacktrace, name)

  def from_caught(:exit, reason, stacktrace, name),
    do: Error.new(name, clip(Bridge.Private.format_exit(reason)), type: "exit", traceback: frames(stacktrace))

  def from_caught(:throw, value, stacktrace, name),
    do: Error.new(name, clip(inspect(value)), type: "throw", traceback: frames(stacktrace))

  @doc "A text as it may travel: UTF-8 whatever it was, and at most #{@max_text} characters of it."
  @spec clip(binary()) :: String.t()
  def clip(text) do
    text = if String.valid?(text), do: text, else: escape(text, "")
    if byte_size(text) <= @max_text, do: text, else: cut(text, text, 0)
  end

  defp cut(rest, text, @max_text) do
    case count(rest, 0) do
      0 -> text
      more -> binary_part(text, 0, byte_size(text) - byte_size(rest)) <> "… (#{more} more characters)"
    end
  end

  defp cut(<<_char::utf8, rest::binary>>, text, taken), do: cut(rest, text, taken + 1)
  defp cut(<<>>, text, _taken), do: text

  # Characters are code points, as Python counts them.
  defp count(<<_char::utf8, rest::binary>>, counted), do: count(rest, counted + 1)
  defp count(<<>>, counted), do: counted

  defp escape(<<char::utf8, rest::binary>>, text), do: escape(rest, <<text::binary, char::utf8>>)

  defp escape(<<byte, rest::binary>>, text),
    do: escape(rest, <<text::binary, "\\x", Base.encode16(<<byte>>, case: :lower)::binary>>)

  defp escape(<<>>, text), do: text

  # What a person reads first: an exception of somebody's code is introduced by its class.
  defp text(%Error{name: name, type: type, message: ""}) when name in [:remote_error, :tool_error], do: type

  defp text(%Error{name: name, type: type, message: message}) when name in [:remote_error, :tool_error],
    do: type <> ": " <> message

  defp text(%Error{message: message}), do: message

  defp frame_out(%{file: file, line: line, function: function, code: code}),
    do: %{"file" => clip(file), "line" => line, "function" => clip(function), "code" => clip(code)}

  defp frames(stacktrace) do
    frames = Enum.reverse(stacktrace)
    count = length(frames)

    if count <= @max_frames do
      Enum.map(frames, &frame/1)
    else
      # Both ends of a recursion, not its middle.
      {first, last} = {div(@max_frames, 2), div(@max_frames, 2) - 1}
      cut = %{file: "…", line: 0, function: "(#{count - first - last} frames left out)", code: ""}
      Enum.map(Enum.take(frames, first), &frame/1) ++ [cut | Enum.map(Enum.take(frames, -last), &frame/1)]
    end
  end

  # The arguments that some entries have stay here: they are values, and may be secret.
  defp frame({module, function, arity, location}) do
    function = Exception.format_mfa(module, function, arity(arity))
    place(location, Atom.to_string(module), function)
  end

  defp frame({fun, arity, location}), do: place(location, "", Exception.format_fa(fun, arity(arity)))

  defp place(location, otherwise, function) do
    file = if file = location[:file], do: List.to_string(file), else: otherwise
    %{file: file, line: location[:line] || 0, function: function, code: ""}
  end

  defp arity(arguments) when is_list(arguments), do: length(arguments)
  defp arity(arity), do: arity
end
