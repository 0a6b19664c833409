defmodule Bridge.Wire.RPC do
  @moduledoc false
  # JSON-RPC 2.0: a decoded object to one of a closed set of messages, and back. Pure; what the methods mean is the
  # engine's. The counterpart of kernel/bridge_kernel/contract/messages.py.

  alias Bridge.{Error, JSON}

  @type id :: integer() | String.t()
  @typedoc "`params` and `result` are what the peer sent, a map if it keeps to the contract."
  @type message ::
          {:request, id(), method :: String.t(), params :: JSON.t()}
          | {:notification, method :: String.t(), params :: JSON.t()}
          | {:result, id(), JSON.t()}
          | {:failure, id() | nil, Error.t()}

  defguardp is_id(id) when is_integer(id) or is_binary(id)

  @doc "The message that a text holds; `:parse_error` or `:invalid_request` if it holds none."
  @spec parse(binary()) :: message() | {:error, Error.t()}
  def parse(text) do
    case JSON.decode(text) do
      {:ok, object} -> decode(object)
      {:error, :invalid} -> Error.error(:parse_error, "not JSON")
    end
  end

  @doc "The message that a decoded object is; `:invalid_request` if it is none."
  @spec decode(term()) :: message() | {:error, Error.t()}
  def decode(%{"jsonrpc" => "2.0", "method" => method} = object) when is_binary(method) do
    params = Map.get(object, "params", %{})

    case object do
      %{"result" => _} -> invalid("a message has a method, or a result, or an error: one of them")
      %{"error" => _} -> invalid("a message has a method, or a result, or an error: one of them")
      %{"id" => id} when is_id(id) -> {:request, id, method, params}
      %{"id" => _} -> invalid("a request's id is an integer or a string")
      _ -> {:notification, method, params}
    end
  end

  def decode(%{"jsonrpc" => "2.0", "method" => _}), do: invalid("a method is a string")

  def decode(%{"jsonrpc" => "2.0", "result" => _, "error" => _}),
    do: invalid("an answer has either a result or an error")

  def decode(%{"jsonrpc" => "2.0", "id" => id, "result" => result}) when is_id(id), do: {:result, id, result}

  def decode(%{"jsonrpc" => "2.0", "id" => id, "error" => error}) when is_id(id) or is_nil(id) do
    case Error.Wire.read(error) do
      {:ok, error} -> {:failure, id, error}
      :error -> invalid("an error is an object with a code and a message")
    end
  end

  def decode(%{"jsonrpc" => "2.0"}), do: invalid("an answer has an id and either a result or an error")
  def decode(_other), do: invalid("it has no \"jsonrpc\": \"2.0\"")

  @doc "A call that wants an answer."
  @spec request(id(), String.t(), map()) :: map()
  def request(id, method, params), do: %{"jsonrpc" => "2.0", "id" => id, "method" => method, "params" => params}

  @doc "A call that wants none."
  @spec notification(String.t(), map()) :: map()
  def notification(method, params), do: %{"jsonrpc" => "2.0", "method" => method, "params" => params}

  @doc "The answer to the request `id`."
  @spec result(id(), JSON.t()) :: map()
  def result(id, result), do: %{"jsonrpc" => "2.0", "id" => id, "result" => result}

  @doc "The refusal of the request `id`; nil if the request could not be read."
  @spec failure(id() | nil, Error.t()) :: map()
  def failure(id, %Error{} = error), do: %{"jsonrpc" => "2.0", "id" => id, "error" => Error.Wire.to_wire(error)}

  defp invalid(why), do: Error.error(:invalid_request, "not a JSON-RPC 2.0 message: " <> why)
end
