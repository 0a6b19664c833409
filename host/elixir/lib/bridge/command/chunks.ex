defmodule Bridge.Command.Chunks do
  @moduledoc false
  # What a stream has sent, over all its attempts: none is given twice, and who reads is never far behind. Pure.

  alias Bridge.{Error, JSON, Request}

  # Credit is given back in halves of the window.
  @half div(Request.credit(), 2)

  defstruct received: 0, consumed: 0, digest: nil, before: 0, again: 0, digest_again: nil, credit: 0

  @type t :: %__MODULE__{}

  @spec new() :: t()
  def new, do: %__MODULE__{digest: start()}

  defp start, do: :crypto.hash_init(:sha256)

  @doc "A new attempt: what had come before comes again."
  @spec attempt(t()) :: t()
  def attempt(chunks) do
    %{chunks | before: chunks.received, again: 0, digest_again: start(), credit: Request.credit()}
  end

  @spec take(t(), map(), [binary()], (term(), String.t() -> {:ok, term()} | {:error, Error.t()})) ::
          {:ok, t(), term()} | {:again, t(), non_neg_integer()} | {:error, Error.t()}
  # Who reads would have to keep it all.
  def take(%{credit: 0}, _params, _buffers, _decode) do
    Error.error(:internal_error, "the kernel sent more of the stream than it had credit for")
  end

  def take(%{again: again, before: before} = chunks, %{"seq" => again, "value" => _} = params, buffers, _decode)
      when again < before do
    chunks = %{
      chunks
      | again: again + 1,
        credit: chunks.credit - 1,
        digest_again: add(chunks.digest_again, params, buffers)
    }

    if chunks.again == before and final(chunks.digest_again) != final(chunks.digest) do
      Error.error(:replay_diverged, "the stream yielded other values when it ran again, among its first #{before}")
    else
      more = if chunks.again <= chunks.consumed and rem(chunks.again, @half) == 0, do: @half, else: 0
      {:again, %{chunks | credit: chunks.credit + more}, more}
    end
  end

  def take(
        %{again: again, before: before, received: due} = chunks,
        %{"seq" => due, "value" => json} = params,
        buffers,
        decode
      )
      when again >= before do
    with {:ok, value} <- decode.(json, "chunk[#{due}]") do
      digest = add(chunks.digest, params, buffers)
      {:ok, %{chunks | received: due + 1, credit: chunks.credit - 1, digest: digest}, value}
    end
  end

  def take(chunks, params, _buffers, _decode) do
    due = if chunks.again < chunks.before, do: chunks.again, else: chunks.received
    shown = inspect(params["seq"], limit: 5, printable_limit: 50)
    Error.error(:internal_error, "chunk #{shown} came where #{due} was due, or without a value")
  end

  @doc "Whether an attempt that has ended sent again all that had come before, and all came that it says it sent."
  @spec check_complete(t() | nil, map()) :: :ok | {:error, Error.t()}
  def check_complete(nil, _result), do: :ok

  def check_complete(%{again: again, before: before}, %{"chunks" => again}) when again < before do
    Error.error(:replay_diverged, "the stream ended after #{again} values when it ran again; #{before} had come before")
  end

  def check_complete(%{received: received}, %{"chunks" => received}), do: :ok

  def check_complete(chunks, result) do
    came = if chunks.again < chunks.before, do: chunks.again, else: chunks.received
    said = inspect(result["chunks"], limit: 5, printable_limit: 50)
    Error.error(:internal_error, "the kernel says that it sent #{said} chunks, and #{came} came")
  end

  defp add(digest, params, buffers) do
    Enum.reduce(buffers, :crypto.hash_update(digest, JSON.canonical(params["value"])), &:crypto.hash_update(&2, &1))
  end

  defp final(digest), do: :crypto.hash_final(digest)

  @doc "One was read; how much credit the kernel is to be given for it now."
  @spec consumed(t()) :: {t(), non_neg_integer()}
  def consumed(chunks) do
    chunks = %{chunks | consumed: chunks.consumed + 1}
    # What has not come again yet is paid for when it comes.
    known? = chunks.again >= chunks.before or chunks.consumed <= chunks.again
    more = if rem(chunks.consumed, @half) == 0 and known?, do: @half, else: 0
    {%{chunks | credit: chunks.credit + more}, more}
  end
end
